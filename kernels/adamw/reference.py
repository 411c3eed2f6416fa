"""One AdamW step (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2) on lists of tensors."""

from typing import NamedTuple

import torch


class Hyperparameters(NamedTuple):
    """Of one step of one parameter group."""

    step: int  # number of this step, from 1
    lr: float  # the decay multiplies the weights by 1 - lr * weight_decay
    betas: tuple[float, float]
    eps: float
    weight_decay: float


class GroupTensors(NamedTuple):
    """Lists of one tensor per parameter, in the same order."""

    params: list[torch.Tensor]  # fp32, like grads
    grads: list[torch.Tensor]
    exp_avgs: list[torch.Tensor]  # fp32, or narrower: rounded after the step
    exp_avg_sqs: list[torch.Tensor]


@torch.no_grad()
def adamw_step_reference(tensors: GroupTensors, hyperparameters: Hyperparameters) -> None:
    """Update parameters and moments in place.

    The order of the operations is torch.optim.AdamW's, so that the numbers are the same.
    """
    params, grads, exp_avgs, exp_avg_sqs = tensors
    if len(params) > 1 and params[0].device.type == "cpu":
        # One parameter at a time stays in the cache; on a GPU one launch serves them all.
        for one in zip(*tensors):
            adamw_step_reference(GroupTensors(*([x] for x in one)), hyperparameters)
        return
    step, lr, (beta1, beta2), eps, weight_decay = hyperparameters
    narrow = []
    if exp_avgs and exp_avgs[0].dtype != torch.float32:
        narrow = [*exp_avgs, *exp_avg_sqs]
        exp_avgs, exp_avg_sqs = ([x.float() for x in states] for states in (exp_avgs, exp_avg_sqs))
    if weight_decay != 0.0:
        torch._foreach_mul_(params, 1.0 - lr * weight_decay)
    torch._foreach_lerp_(exp_avgs, grads, 1.0 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1.0 - beta2)
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(denominators, (1.0 - beta2**step) ** 0.5)
    torch._foreach_add_(denominators, eps)
    torch._foreach_addcdiv_(params, exp_avgs, denominators, -lr / (1.0 - beta1**step))
    if narrow:
        torch._foreach_copy_(narrow, [*exp_avgs, *exp_avg_sqs])
