"""All schemes: a new one is a module beside this and a line here."""

from enclave_runtime.schemes.contract import SCHEMES as SCHEMES
from enclave_runtime.schemes.contract import Group as Group
from enclave_runtime.schemes.contract import Scheme as Scheme
from enclave_runtime.schemes.contract import SchemeCost as SchemeCost
from enclave_runtime.schemes.mixing import Mixing as Mixing
from enclave_runtime.schemes.orthogonal import Orthogonal as Orthogonal
from enclave_runtime.schemes.secret_shares import SecretShares as SecretShares
from enclave_runtime.schemes.signed_permutation import SignedPermutation as SignedPermutation
from enclave_runtime.schemes.tempo import Tempo as Tempo
