"""The commands of the console and of command files: one file each, or one for a small family."""
