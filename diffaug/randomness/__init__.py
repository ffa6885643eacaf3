"""Randomness: what a draw depends on. Keyed numbers (`philox`), and the global random states that the user's code
draws from (`user_code`)."""
