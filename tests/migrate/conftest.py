"""Programs written for torch.ao are data here: not to be imported when tests are collected."""

collect_ignore = ["networks", "programs"]
