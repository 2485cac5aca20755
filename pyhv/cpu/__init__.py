"""Knowledge of processors: pure Python that runs no guest."""
