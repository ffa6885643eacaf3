"""Randomness: what a draw depends on. Its key (`keys`), the numbers made of it (`philox`), and the global random
states that the user's code draws from (`user_code`)."""
