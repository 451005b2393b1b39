"""What a teacher is, and the kinds there are: a frozen model in this process, or one behind vLLM servers. A teacher
scores token ids and proposes completions; whatever has the members of `Teacher` is one.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "protocol": ["Teacher", "TeacherError", "TopKTeacher", "TopScores"],
        "local": ["LocalTeacher"],
        "http": ["Endpoints", "TeacherServerError"],
        "server": ["ServerTeacher"],
    },
)
