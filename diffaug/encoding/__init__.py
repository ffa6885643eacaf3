"""Encoding: datasets into stores, by a Trainer on any number of ranks.

`parts` looks at the datasets (`unwrap` takes them out of another DataModule), `module` is the LightningModule whose
predict_step writes the rows, `fingerprint` says what made them, `update` makes only what is new or changed, `space` is
what they take on the disk, `autoencoder` what goes into an export of latents.
"""
