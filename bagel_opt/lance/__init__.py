"""Lance (ByteDance, arXiv 2605.18678), the second family: its sizes, and its pictures and videos on the host."""
