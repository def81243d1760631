"""The blocks of code in NNI's documentation of its quantizers, and the import lines that change.

The blocks are quoted from "Supported Quantization Algorithms on NNI" (v2.7). One has a typing error there, 'uint
without its closing quote, which is mended here.
"""

from __future__ import annotations

IMPORTS = {
    "from nni.algorithms.compression.pytorch.quantization import QAT_Quantizer": "from quantkern import QAT_Quantizer",
    "from nni.algorithms.compression.pytorch.quantization import LsqQuantizer": "from quantkern import LsqQuantizer",
    "from nni.algorithms.compression.pytorch.quantization import DoReFaQuantizer": (
        "from quantkern import DoReFaQuantizer"
    ),
    "from nni.algorithms.compression.pytorch.quantization import BNNQuantizer": "from quantkern import BNNQuantizer",
    "from nni.algorithms.compression.pytorch.quantization import ObserverQuantizer": (
        "from quantkern import ObserverQuantizer"
    ),
    "from nni.compression.pytorch.quantization.settings import set_quant_scheme_dtype": (
        "from quantkern.settings import set_quant_scheme_dtype"
    ),
    "nni.algorithms.compression.pytorch.quantization.NaiveQuantizer": "quantkern.NaiveQuantizer",
}

NAIVE = """
model = nni.algorithms.compression.pytorch.quantization.NaiveQuantizer(model).compress()
"""

QAT = """
from nni.algorithms.compression.pytorch.quantization import QAT_Quantizer
model = Mnist()
config_list = [{
'quant_types': ['weight'],
'quant_bits': {
'weight': 8,
}, # you can just use `int` here because all `quan_types` share same bits length, see config for `ReLu6` below.
'op_types':['Conv2d', 'Linear']
}, {
'quant_types': ['output'],
'quant_bits': 8,
'quant_start_step': 7000,
'op_types':['ReLU6']
}]
quantizer = QAT_Quantizer(model, config_list)
quantizer.compress()
"""

BATCH_NORM_FOLDING = """
# assume your model takes an input of shape (1, 1, 28, 28)
# and dummy_input must be on the same device as the model
dummy_input = torch.randn(1, 1, 28, 28)
# pass the dummy_input to the quantizer
quantizer = QAT_Quantizer(model, config_list, dummy_input=dummy_input)
"""

DEFAULTS = """
from nni.compression.pytorch.quantization.settings import set_quant_scheme_dtype
# This will set all the quantization of 'input' in 'per_tensor_affine' and 'uint' manner
set_quant_scheme_dtype('input', 'per_tensor_affine', 'uint')
# This will set all the quantization of 'output' in 'per_tensor_symmetric' and 'int' manner
set_quant_scheme_dtype('output', 'per_tensor_symmetric', 'int')
# This will set all the quantization of 'weight' in 'per_channel_symmetric' and 'int' manner
set_quant_scheme_dtype('weight', 'per_channel_symmetric', 'int')
"""

RULES = """
config_list = [{
'quant_types': ['weight'],
'quant_bits': 8,
'op_types':['Conv2d', 'Linear'],
'quant_dtype': 'int',
'quant_scheme': 'per_channel_symmetric'
}, {
'quant_types': ['output'],
'quant_bits': 8,
'quant_start_step': 7000,
'op_types':['ReLU6'],
'quant_dtype': 'uint',
'quant_scheme': 'per_tensor_affine'
}]
"""

MULTI_GPU = """
from torch.nn.parallel import DistributedDataParallel as DDP
from nni.algorithms.compression.pytorch.quantization import QAT_Quantizer
model = define_your_model()
model = QAT_Quantizer(model, **other_params) # <--- QAT_Quantizer instantiation
model = DDP(model)
for i in range(epochs):
    train(model)
    eval(model)
"""

LSQ = """
from nni.algorithms.compression.pytorch.quantization import LsqQuantizer
model = Mnist()
configure_list = [{
'quant_types': ['weight', 'input'],
'quant_bits': {
'weight': 8,
'input': 8,
},
'op_names': ['conv1']
}, {
'quant_types': ['output'],
'quant_bits': {'output': 8,},
'op_names': ['relu1']
}]
quantizer = LsqQuantizer(model, configure_list, optimizer)
quantizer.compress()
"""

DOREFA = """
from nni.algorithms.compression.pytorch.quantization import DoReFaQuantizer
config_list = [{
'quant_types': ['weight'],
'quant_bits': 8,
'op_types': ['default']
}]
quantizer = DoReFaQuantizer(model, config_list)
quantizer.compress()
"""


BNN = """
from nni.algorithms.compression.pytorch.quantization import BNNQuantizer
model = VGG_Cifar10(num_classes=10)
configure_list = [{
'quant_bits': 1,
'quant_types': ['weight'],
'op_types': ['Conv2d', 'Linear'],
'op_names': ['features.0', 'features.3', 'features.7', 'features.10', 'features.14', 'features.17', 'classifier.0', 'classifier.3']
}, {
'quant_bits': 1,
'quant_types': ['output'],
'op_types': ['Hardtanh'],
'op_names': ['features.6', 'features.9', 'features.13', 'features.16', 'features.20', 'classifier.2', 'classifier.5']
}]
quantizer = BNNQuantizer(model, configure_list)
model = quantizer.compress()
"""  # noqa: E501


# The document has lost the indentation, and two quotation marks behind 'conv2 and 'relu2.
OBSERVER = """
from nni.algorithms.compression.pytorch.quantization import ObserverQuantizer
def calibration(model, calib_loader):
    model.eval()
    with torch.no_grad():
        for data, _ in calib_loader:
            model(data)
model = Mnist()
configure_list = [{
'quant_bits': 8,
'quant_types': ['weight', 'input'],
'op_names': ['conv1', 'conv2'],
}, {
'quant_bits': 8,
'quant_types': ['output'],
'op_names': ['relu1', 'relu2'],
}]
quantizer = ObserverQuantizer(model, configure_list)
calibration(model, calib_loader)
model = quantizer.compress()
"""

# From the docstring of the class.
OBSERVER_EXAMPLE = """
from nni.algorithms.compression.pytorch.quantization import ObserverQuantizer
config_list = [{'quant_types': ['weight', 'input'], 'quant_bits': {'weight': 8, 'input': 8}, 'op_types': ['Conv2d']}]
quantizer = ObserverQuantizer(model, config_list)
# define a calibration function
def calibration(model, calib_loader):
    model.eval()
    with torch.no_grad():
        for data, _ in calib_loader:
            model(data)
calibration(model, calib_loader)
quantizer.compress()
"""
