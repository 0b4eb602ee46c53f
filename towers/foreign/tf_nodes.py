"""tf_nodes: what TensorFlow calls nodes of graphs, and what it notes of them.

TensorFlow has no public list of these. `tf_nodes_test.py` fails when one of them
changes.
"""

# Ops by which the parts of a function that is cut talk to each other.
SENDS = ("_Send", "_HostSend")
RECEIVES = ("_Recv", "_HostRecv")
# Ops by which a function takes and returns.
ARGUMENTS = ("_Arg", "_DeviceArg")
RESULTS = ("_Retval", "_DeviceRetval")

# Attributes of nodes: the gradient that an op has in the place of its own; the
# ops that it is to be beside; what a function's argument is called; and of
# which shapes and dtypes the variables behind it are.
GRADIENT = "_gradient_op_type"
BESIDE = "_class"
CALLED = "_user_specified_name"
HANDLE_SHAPES, HANDLE_DTYPES = "_handle_shapes", "_handle_dtypes"
# An attribute of functions: that calls of one stay calls.
NOT_INLINED = "_noinline"
