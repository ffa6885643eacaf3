"""Images: an item of a dataset -> the image as a tensor, and the rest by name.

`items` finds the image of an item and refuses what is none, `aligned` keeps several images of an item in step,
`pixels` reads a Pillow image of any mode, `fit` crops and resizes it to a shape.
"""
