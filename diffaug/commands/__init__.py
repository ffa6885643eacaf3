"""The commands of ``python -m diffaug``, each with what it does in a file of its own; Hydra is left to __main__."""
