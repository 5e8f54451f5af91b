"""Downloads over a slow link that breaks: parts, ranges, limits, and files from a USB stick."""
