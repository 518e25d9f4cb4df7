# SPDX-License-Identifier: MIT
# For the lints: what of a line of C is code. in_comment is kept between lines; reset it for each file.

# The line without comments and with empty string literals.
function code(line,    i, before) {
	gsub(/"([^"\\]|\\.)*"/, "\"\"", line)
	if (in_comment) {
		i = index(line, "*/")
		if (!i)
			return ""
		line = substr(line, i + 2)
		in_comment = 0
	}
	while (i = index(line, "/*")) {
		before = substr(line, 1, i - 1)
		line = substr(line, i + 2)
		i = index(line, "*/")
		if (!i) {
			in_comment = 1
			return before
		}
		line = before " " substr(line, i + 2)
	}
	sub(/\/\/.*/, "", line)
	return line
}
