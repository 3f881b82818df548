"""The user's own machine code as condition or action of an event: from text to bytes, and run where it can do no harm."""
