"""What benchmarks and tests share: a server process, load on it, the machine, pages to write."""
