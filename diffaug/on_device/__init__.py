"""The device: what happens to a batch of images there, up to the noise.

`noiser` goes through it in order: the user's device_transform, the encoder (`posterior` draws its latents), views,
noise on conditions (`condition_noise`), holes (`holes`), label dropout (`labels`), then the ForwardProcess.
"""
