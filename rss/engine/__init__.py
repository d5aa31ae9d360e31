"""How an operation reaches Redis and comes back."""
