"""The Python half of the wire between the debugger and the agent."""
