"""All stages after one another, within memory and minutes."""
