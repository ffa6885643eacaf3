"""Randomness: what a draw depends on. Its key (`keys`), the numbers made of that (`philox`), their way to the device
(`transfer`), and the global random states that the user's code draws from (`user_code`)."""
