"""The commands of ``kvq``, one file each: parse, call, render. Heavy imports happen inside the commands."""
