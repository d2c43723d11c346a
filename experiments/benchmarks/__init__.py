"""What `experiments.benchmark` can measure, one file each."""
