"""The commands of `fewstep`, one file each for what they do."""
