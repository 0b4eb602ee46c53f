"""engine: one tower on its device, forward and backward. It knows no Keras.

`README.md` beside this file says why it is as it is.
"""
