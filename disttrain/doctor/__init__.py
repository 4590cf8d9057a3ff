"""What breaks in practice, tried for real: each check on its own, so that one that fails or hangs hides no other."""

from disttrain.doctor.checks import Check as Check
from disttrain.doctor.checks import Question as Question
from disttrain.doctor.checks import checks_for as checks_for
from disttrain.doctor.examine import examine as examine
from disttrain.doctor.finding import Finding as Finding
