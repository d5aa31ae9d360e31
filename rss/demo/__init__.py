"""What the library is for, to watch."""
