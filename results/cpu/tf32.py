"""distill.py with convolutions as a GPU computes them in TF32, at a CPU's pace: what goes into them,
forwards and backwards, is rounded to ten bits of mantissa (lab book, section 4).

    PYTHONPATH=. python results/cpu/tf32.py OPTIONS_OF_DISTILL
"""
import torch

import distill


def round_to_tf32(x):
    """float32 -> the nearest with ten of its 23 bits of mantissa, ties to even."""
    bits = x.view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


class Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, stride, padding):
        x, weight = round_to_tf32(x), round_to_tf32(weight)
        ctx.save_for_backward(x, weight)
        ctx.shape = stride, padding
        return torch.conv2d(x, weight, None, stride, padding)

    @staticmethod
    def backward(ctx, grad):
        wanted = ctx.needs_input_grad[0], True, False
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            round_to_tf32(grad), *ctx.saved_tensors, None, *ctx.shape, (1, 1), False, (0, 0), 1,
            wanted)
        return grad_x, grad_weight, None, None


def forward(self, x):
    y = Convolution.apply(x, self.weight, self.stride, self.padding)
    return y if self.bias is None else y + self.bias.view(-1, 1, 1)


torch.nn.Conv2d.forward = forward
distill.main()
