"""Encoding: datasets into stores, by a Trainer on any number of ranks.

`splits` looks at the datasets (`unwrap` takes them out of another DataModule), `module` is the LightningModule whose
predict_step writes the rows, `fingerprint` says what made them, `update` makes only what is new or changed,
`disk_space` estimates what they take, `autoencoder` finds what goes into an export of latents.
"""
