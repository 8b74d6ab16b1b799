"""Small things everybody uses: errors, logging, rank facts, files. Imports nothing of swiftlite."""
