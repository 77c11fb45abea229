"""The loop: from files or frames, through the contract and the engine, to answers in order."""
