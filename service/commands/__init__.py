"""What `tapt-serve` does besides serving: answers in a terminal, many images, and all flags."""
