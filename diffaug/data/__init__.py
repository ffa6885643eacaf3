"""The DataModules: any image data in, ``(x_t, epsilon, t)`` on the accelerator out.

What a sample passes, in this order, and the file that has it:

in the workers    an item of the dataset, found by its Place                       dataset (of a stream: stream)
                  its image, as a tensor, and the rest by name                     items (several images: aligned)
                  the user's transform; still uint8: a quarter of the bytes        dataset
                  in an order that every rank can tell                             order (validation: evaluation)
                  joined into a batch                                              batch
on the device     device_transform, encoder, views, noise on conditions, holes,    device, posterior, condition_noise,
                  label dropout, then the                                          holes, labels
                  ForwardProcess: NoisyBatch(x_t, epsilon, t) -> training_step

Who does it: `module` for your datasets (`sources` makes them), `wrapped` for another DataModule (`rebuild` its
loaders), both on `base`; none of them knows Lightning, and `packages` tells its two packages apart. What a checkpoint
holds: `recipe` what a run trains on, `progress` and `resume` how far it is. The data of configs/data: `catalogue`,
`folder` (`pixels`, `fit`, `broken`; with `buckets` and `sizes`, and `bucketed` for your own data), and `store`, which
`encode` writes, `shards` and `latents` with it.
"""
