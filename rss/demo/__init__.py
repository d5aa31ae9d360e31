"""What the library is for, to watch."""

import rss.errors  # noqa: F401 - it raises if another distribution has replaced `rss`
