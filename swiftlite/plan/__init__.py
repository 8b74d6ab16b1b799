"""What a run or a conversion will need before it starts."""
