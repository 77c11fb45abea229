"""What an engine answers on labelled images: accuracy, agreement with another, and the gate before shipping."""
