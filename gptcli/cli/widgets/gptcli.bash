# gptcli at bash's command line: completions of the line by a warm model.
#
# @KEY@ inserts the likeliest at the cursor; pressed again it goes on to the next one, and at last back to what was there,
# as undo (Ctrl-_) does at once. Where no model is warm, it says so above the line. It only ever writes on the line.
# gptcli-unload takes all of it away.

declare -F gptcli-unload >/dev/null && gptcli-unload

_gptcli_socket=@SOCKET@      # of the model's warm process
_gptcli_key=@BINDING@
_gptcli_num=@NUM@ _gptcli_until=@UNTIL@ _gptcli_min_prob=@MIN_PROB@
_gptcli_seconds=@SECONDS@    # that the search may take
_gptcli_limit=@LIMIT@        # seconds after which nobody waits for the answer any more
_gptcli_command=(@COMMAND@)  # asks where there is no curl
_gptcli_cold=@COLD@          # what the key says where no model is warm

_gptcli_texts=()  # the answer, behind an empty text
_gptcli_at=0      # which of them stands on the line
_gptcli_left=     # the line that was asked about, to the left and to the right of the cursor
_gptcli_right=
_gptcli_before=() # what the key did before

_gptcli_press() {
  local IFS=$' \t\n' left right
  # What is right of the cursor, and left of it: bash counts bytes before 5.0, and characters since.
  if ((BASH_VERSINFO[0] < 5)); then
    local LC_ALL=C
  fi
  left=${READLINE_LINE:0:READLINE_POINT} right=${READLINE_LINE:READLINE_POINT}
  if [[ ${#_gptcli_texts[@]} -gt 1 && $left == "$_gptcli_left${_gptcli_texts[_gptcli_at]}" &&
    $right == "$_gptcli_right" ]]; then
    _gptcli_at=$(((_gptcli_at + 1) % ${#_gptcli_texts[@]}))
  else
    _gptcli_left=$left _gptcli_right=$right _gptcli_at=0
    _gptcli_ask
    if [[ ${#_gptcli_texts[@]} -le 1 ]]; then return 0; fi
    _gptcli_at=1
  fi
  left=$_gptcli_left${_gptcli_texts[_gptcli_at]}
  READLINE_LINE=$left$_gptcli_right
  READLINE_POINT=${#left}
}

_gptcli_ask() {
  local line
  _gptcli_texts=("")
  if [[ ! -S $_gptcli_socket ]]; then
    printf '%s\n' "$_gptcli_cold" >&2
    return 0
  fi
  while IFS= read -r -t "$_gptcli_limit" line; do
    if [[ $line == '!' ]]; then
      printf '%s\n' "$_gptcli_cold" >&2
      return 0
    fi
    line=${line#*$'\t'}
    line=${line//[[:cntrl:]]/}
    if [[ -n $line ]]; then _gptcli_texts+=("$line"); fi
  done < <(_gptcli_answer 2>/dev/null)
}

# Typed text is nobody else's business: it goes through pipes, never through arguments.
_gptcli_answer() {
  local left=$_gptcli_left right=${_gptcli_right%%$'\n'*}
  if ((${#left} > 4000)); then left=${left: -4000}; fi
  right=${right:0:400}
  if type -P curl >/dev/null; then
    left=${left//\\/\\\\} left=${left//\"/\\\"} left=${left//$'\n'/\\n} left=${left//$'\r'/\\r}
    right=${right//\\/\\\\} right=${right//\"/\\\"}
    printf 'data-urlencode = "prefix=%s"\ndata-urlencode = "suffix=%s"\n' "$left" "$right" |
      command curl -qsf -m "$_gptcli_limit" --unix-socket "$_gptcli_socket" -K - \
        -d num="$_gptcli_num" -d until="$_gptcli_until" -d min_prob="$_gptcli_min_prob" \
        -d deadline_seconds="$_gptcli_seconds" http://localhost/gptcli/complete
    if (($? == 7)); then echo '!'; fi # a socket without its process
  else
    printf %s "$left" | GPTCLI_SUFFIX=$right "${_gptcli_command[@]}" --num "$_gptcli_num" --until "$_gptcli_until" \
      --min-prob "$_gptcli_min_prob" --deadline "$_gptcli_seconds" -
  fi
}

gptcli-unload() {
  local map before
  for map in emacs-standard vi-insert; do
    bind -m "$map" -r "$_gptcli_key" 2>/dev/null
  done
  for before in ${_gptcli_before[@]+"${_gptcli_before[@]}"}; do
    bind -m "${before%% *}" "${before#* }" 2>/dev/null
  done
  unset -f _gptcli_press _gptcli_ask _gptcli_answer gptcli-unload
  unset "${!_gptcli_@}"
}

if ((BASH_VERSINFO[0] < 4)); then
  echo "gptcli: bash $BASH_VERSION has no way to write on its line; 4.0 or later has" >&2
  gptcli-unload
elif [[ $- == *i* ]]; then
  for _gptcli_map in emacs-standard vi-insert; do
    while IFS= read -r _gptcli_line; do
      if [[ $_gptcli_line == "\"$_gptcli_key\": "* ]]; then _gptcli_before+=("$_gptcli_map $_gptcli_line"); fi
    done < <(bind -m "$_gptcli_map" -p 2>/dev/null)
    bind -m "$_gptcli_map" -x "\"$_gptcli_key\": _gptcli_press"
  done
fi
