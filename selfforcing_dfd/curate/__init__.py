"""From a folder of videos to training data, step by step; each step is one file and can resume."""
