"""The DataModules: any image data in, ``(x_t, epsilon, t)`` on the accelerator out.

What a sample passes, in this order, and the room that has it:

in the workers    an item of a dataset, found by its Place                      datasets, store, loader.dataset
                  its image, as a tensor, and the rest by name                  images
                  the user's transform; still uint8: a quarter of the bytes     loader.dataset or loader.stream
                  in an order that every rank can tell                          order
                  joined into a batch                                           loader.batch
on the device     device_transform, encoder, views, noise on conditions,        device
                  holes, label dropout, then the
                  ForwardProcess: NoisyBatch(x_t, epsilon, t)                   process
                  -> training_step                                              training

Who does it: `module` for your datasets (`sources` makes them), `wrapped` for another DataModule (`rebuild` its
loaders, which `nest`), both on `base`; none of them knows Lightning, and `packages` tells its two packages apart. What
a checkpoint holds: `recipe` what a run trains on, `progress` and `resume` how far it is. `catalogue` has the data of
configs/data.
"""
