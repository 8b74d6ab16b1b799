"""What is known about models before any of them is opened: dataclasses only, no behaviour beyond lookups."""
