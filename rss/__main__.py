"""Run the operator's command: `python -m rss`."""

from rss.cli import main

if __name__ == "__main__":
    main()
