"""The paper's study as one command: many trainings, resumable, and what they say together."""
