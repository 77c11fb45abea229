"""What an engine answers on labelled images: accuracy, and agreement with another."""
