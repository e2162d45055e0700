"""Channels sorted by what their errors cost: the Karhunen-Loeve transform of what is read (transform coding).

With C the covariance of stored tokens and M the second moment of what reads them (``balance.py``), the columns of

    P = M^1/2 U L^-1/4,      U L U^T = M^1/2 C M^1/2,      L falling

make both diagonal: P^T C P = P^-1 M P^-T = L^1/2. So channel c of k' = k P has errors that are independent of those of
the others and cost L_c per unit of its relative error. No basis has a smaller product of costs (Hadamard's inequality),
which is what matters once every channel may have bits of its own, as in the codec ``tiers``.
"""

import torch

from kvq.transforms.balance import MomentsSpec, joint_basis, reading_moments
from kvq.transforms.fit_data import FitData
from kvq.transforms.spec import register_transform


@register_transform("principal")
class PrincipalSpec(MomentsSpec):
    """Independent channels, sorted by what their errors cost."""

    def fit(self, data: FitData) -> dict[str, torch.Tensor]:
        return {"matrix": joint_basis(*reading_moments(data)).float()}
