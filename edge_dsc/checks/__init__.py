"""What works on this machine: what is installed, and everything tried once; and what a file of ours is."""
