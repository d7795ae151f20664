"""The life of a run: how it reads, resumes and delivers."""
