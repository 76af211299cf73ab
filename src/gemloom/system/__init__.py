"""What the process gets from the machine: cores, memory, signals."""
