"""The engine sends operations to Redis in batches, and hands out the replies."""
