"""Side-by-side measurements against peers; numbers with hardware and command are in results.md."""
