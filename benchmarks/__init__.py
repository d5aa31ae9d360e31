"""What can be measured: run it, on whatever Redis there is."""
