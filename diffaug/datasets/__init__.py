"""Datasets: what is read, each asked for by index.

`folder` has image files (`sizes` reads their headers, `broken` lists those that cannot be read), `buckets` shapes for
images of their own proportions and `bucketed` your own dataset brought to them, `mixture` several datasets at once,
`indexed` the streams of libraries, by index. `atomic_file` writes what is kept beside images.
"""
