"""One AdamW step (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2) on lists of tensors."""

import torch


@torch.no_grad()
def adamw_step_reference(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Update params, exp_avgs and exp_avg_sqs in place.

    The order of the operations is torch.optim.AdamW's, so that the numbers are the same.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: one of each per parameter, fp32; moments may be of a
            narrower dtype, to which they are rounded after the step.
        step: number of this step, from 1.
        lr: learning rate; the decay multiplies the weights by 1 - lr * weight_decay.
    """
    if len(params) > 1 and params[0].device.type == "cpu":
        # One parameter at a time stays in the cache; on a GPU one launch serves them all.
        for tensors in zip(params, grads, exp_avgs, exp_avg_sqs):
            adamw_step_reference(
                *([tensor] for tensor in tensors),
                step=step,
                lr=lr,
                betas=betas,
                eps=eps,
                weight_decay=weight_decay,
            )
        return
    narrow = []
    if exp_avgs and exp_avgs[0].dtype != torch.float32:
        narrow = [*exp_avgs, *exp_avg_sqs]
        exp_avgs, exp_avg_sqs = ([x.float() for x in states] for states in (exp_avgs, exp_avg_sqs))
    beta1, beta2 = betas
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
