# gptcli at zsh's command line: completions of the line by a warm model, as ghost text behind it.
#
# @KEY@ asks at the cursor, and once more for the next one; Right or End takes it, Alt-F or Ctrl-Right a word of it, any
# other key hides it. Where no model is warm, it says so below the line. Where no ghost can be shown (text behind the
# cursor, or a suggestion of zsh-autosuggestions) the completion is inserted, and the key goes on to the next one, and at
# last back to what was there. It only ever writes on the line. gptcli-unload takes all of it away.

(( $+functions[gptcli-unload] )) && gptcli-unload
zmodload zsh/system zsh/zselect zsh/zleparameter 2>/dev/null
autoload -Uz add-zle-hook-widget

typeset -g _gptcli_socket=@SOCKET@      # of the model's warm process
typeset -g _gptcli_key=@BINDING@
typeset -g _gptcli_ghosts=@GHOST@       # 1: also while typing
typeset -g _gptcli_num=@NUM@ _gptcli_until=@UNTIL@ _gptcli_min_prob=@MIN_PROB@
typeset -g _gptcli_seconds=@SECONDS@    # that the search may take
typeset -g _gptcli_limit=@LIMIT@        # seconds after which nobody waits for the answer any more
typeset -ga _gptcli_command=(@COMMAND@) # asks where there is no curl
typeset -g _gptcli_cold=@COLD@          # what the key says where no model is warm
typeset -g _gptcli_pause=12             # hundredths of a second without a key, before it asks while typing

typeset -ga _gptcli_texts=()  # the answer
typeset -g _gptcli_at=1       # which of its texts is shown
typeset -g _gptcli_ghost=     # what is shown behind the line
typeset -g _gptcli_mark=      # its entry in region_highlight
typeset -g _gptcli_for=       # the line and the cursor that the answer is for
typeset -g _gptcli_mode=      # how it is shown: ghost, or line
typeset -g _gptcli_asked=     # the line and the cursor that are asked about
typeset -g _gptcli_seen=      # the line and the cursor when they were last drawn
typeset -g _gptcli_inserted=  # what was inserted at the cursor
typeset -g _gptcli_by_key=0   # whether it was the key that asked
typeset -g _gptcli_said=0     # whether it is said below the line that no model is warm
typeset -g _gptcli_fd= _gptcli_pid=
typeset -gA _gptcli_before=() # what keys did before, by keymap and key
typeset -ga _gptcli_bound=()  # keymaps and keys, as bindkey takes them

# Ask in a process of its own, which answers through a pipe; after a pause of $1 hundredths of a second.
_gptcli_ask() {
  emulate -L zsh
  _gptcli_hang_up
  if [[ ! -S $_gptcli_socket ]]; then
    _gptcli_say
    return 0
  fi
  _gptcli_asked="$CURSOR $BUFFER"
  local left="${LBUFFER[-4000,-1]}" right="${${RBUFFER%%$'\n'*}[1,400]}"
  # Typed text is nobody else's business: it goes through pipes, never through arguments.
  # Its stderr is closed within: a redirection behind this exec would be the shell's own from then on.
  exec {_gptcli_fd}< <(
    exec 2>/dev/null
    (( $1 )) && zselect -t $1
    if (( $+commands[curl] )); then
      left="${${${${left//\\/\\\\}//\"/\\\"}//$'\n'/\\n}//$'\r'/\\r}"
      right="${${right//\\/\\\\}//\"/\\\"}"
      answer=$(print -r -- "data-urlencode = \"prefix=$left\"
data-urlencode = \"suffix=$right\"" |
        command curl -qsf -m $_gptcli_limit --unix-socket "$_gptcli_socket" -K - \
          -d num=$_gptcli_num -d until=$_gptcli_until -d min_prob=$_gptcli_min_prob \
          -d deadline_seconds=$_gptcli_seconds http://localhost/gptcli/complete)
      (( $? == 7 )) && answer='!' # a socket without its process
    else
      answer=$(print -rn -- "$left" |
        GPTCLI_SUFFIX=$right "${_gptcli_command[@]}" --num $_gptcli_num --until $_gptcli_until \
          --min-prob $_gptcli_min_prob --deadline $_gptcli_seconds -)
    fi
    print -rn -- "$answer"
  )
  _gptcli_pid=$sysparams[procsubstpid]
  zle -F -w $_gptcli_fd _gptcli-answer
}

_gptcli_hang_up() {
  emulate -L zsh
  [[ -n $_gptcli_fd ]] || return 0
  zle -F $_gptcli_fd 2>/dev/null
  exec {_gptcli_fd}<&-
  [[ -n $_gptcli_pid ]] && kill -- $_gptcli_pid 2>/dev/null
  _gptcli_fd= _gptcli_pid= _gptcli_asked=
}

# Nobody is there: whoever pressed the key should know.
_gptcli_say() {
  (( _gptcli_by_key )) || return 0
  zle -M "$_gptcli_cold"
  _gptcli_said=1
}

# What was asked for is there, or nobody will answer.
_gptcli_answer() {
  emulate -L zsh
  local answer= asked=$_gptcli_asked
  IFS= read -r -u $1 -d '' answer
  _gptcli_pid=
  _gptcli_hang_up
  [[ $asked == "$CURSOR $BUFFER" ]] || return 0
  local line
  _gptcli_texts=()
  if [[ $answer == '!' ]]; then
    _gptcli_say
    zle -R
    return 0
  fi
  for line in ${(f)answer}; do
    line="${${line#*$'\t'}//[[:cntrl:]]/}"
    [[ -n $line ]] && _gptcli_texts+=("$line")
  done
  (( $#_gptcli_texts )) || return 0
  _gptcli_at=1 _gptcli_for=$asked _gptcli_inserted= _gptcli_mode=
  if _gptcli_has_room; then
    _gptcli_mode=ghost
    _gptcli_show
  elif (( _gptcli_by_key )); then
    _gptcli_mode=line
    _gptcli_insert
  fi
  zle -R
}

# Whether a ghost would stand at the cursor, and in nobody's way.
_gptcli_has_room() {
  (( CURSOR == $#BUFFER )) && [[ -z $POSTDISPLAY || $POSTDISPLAY == "$_gptcli_ghost" ]]
}

_gptcli_show() {
  _gptcli_hide
  _gptcli_ghost=$_gptcli_texts[_gptcli_at]
  POSTDISPLAY=$_gptcli_ghost
  _gptcli_paint
}

_gptcli_paint() {
  local mark="$#BUFFER $(( $#BUFFER + $#POSTDISPLAY )) ${GPTCLI_GHOST_STYLE:-fg=8}"
  (( $region_highlight[(Ie)$mark] )) || region_highlight+=("$mark")
  _gptcli_mark=$mark
}

_gptcli_hide() {
  emulate -L zsh
  [[ -n $_gptcli_ghost ]] || return 0
  [[ $POSTDISPLAY == "$_gptcli_ghost" ]] && POSTDISPLAY=
  [[ -n $_gptcli_mark ]] && region_highlight=("${(@)region_highlight:#$_gptcli_mark}")
  _gptcli_ghost= _gptcli_mark=
}

# Put the text on the line in place of the one inserted before, with the cursor behind it.
_gptcli_insert() {
  local text="${_gptcli_texts[_gptcli_at]-}"
  LBUFFER="${LBUFFER[1,$#LBUFFER - $#_gptcli_inserted]}$text"
  POSTDISPLAY= # another's suggestion was for another line
  _gptcli_inserted=$text
  _gptcli_for="$CURSOR $BUFFER" _gptcli_seen=$_gptcli_for
}

_gptcli_is_shown() {
  [[ -n $_gptcli_ghost && $POSTDISPLAY == "$_gptcli_ghost" && $_gptcli_for == "$CURSOR $BUFFER" ]]
}

# The key: ask; where there is an answer, show its next text.
_gptcli_press() {
  emulate -L zsh
  if [[ -z $_gptcli_mode || $_gptcli_for != "$CURSOR $BUFFER" ]]; then
    _gptcli_by_key=1
    (( _gptcli_said )) && zle -Rc
    _gptcli_said=0
    _gptcli_ask 0
  elif [[ $_gptcli_mode == line ]]; then
    (( _gptcli_at = (_gptcli_at + 1) % ($#_gptcli_texts + 1) )) # 0: nothing is inserted
    _gptcli_insert
  elif _gptcli_has_room; then
    [[ -n $_gptcli_ghost ]] && (( _gptcli_at = _gptcli_at % $#_gptcli_texts + 1 ))
    _gptcli_show
  fi
  return 0
}

# A key that moves to the right, or to the end: it takes the ghost, where there is one.
_gptcli_take() {
  if _gptcli_is_shown; then
    local text=$_gptcli_ghost
    _gptcli_hide
    LBUFFER+=$text
    _gptcli_forget
  else
    local place="${WIDGET##*-} $KEYS"
    zle "${_gptcli_before[$place]:-.forward-char}" -- "$@"
  fi
}

# A key that moves a word to the right: it takes a word of the ghost, where there is one, and the marks before it.
_gptcli_word() {
  if _gptcli_is_shown; then
    _gptcli_take_word
  else
    local place="${WIDGET##*-} $KEYS"
    zle "${_gptcli_before[$place]:-.forward-word}" -- "$@"
  fi
}

_gptcli_take_word() {
  emulate -L zsh
  setopt extendedglob
  local word="${(M)_gptcli_ghost##[[:space:]]#[^[:alnum:]_[:space:]]#[[:alnum:]_]#}"
  local rest="${_gptcli_ghost#$word}"
  if [[ -z $rest ]]; then
    _gptcli_hide
    LBUFFER+=$word
    _gptcli_forget
    return
  fi
  # The key goes on to those of the others that begin so, too.
  local text
  local -a texts=("$rest")
  for text in "${(@)_gptcli_texts[_gptcli_at + 1,-1]}" "${(@)_gptcli_texts[1,_gptcli_at - 1]}"; do
    [[ $text == "$word"?* ]] && texts+=("${text#$word}")
  done
  _gptcli_hide
  LBUFFER+=$word
  _gptcli_texts=("${(@)texts}") _gptcli_at=1
  _gptcli_for="$CURSOR $BUFFER" _gptcli_seen=$_gptcli_for
  _gptcli_show
}

# Esc: hides the ghost; where there is none, it does what it did.
_gptcli_escape() {
  local shown=$_gptcli_ghost place="${WIDGET##*-} $KEYS"
  local before=${_gptcli_before[$place]}
  _gptcli_hide
  _gptcli_hang_up
  [[ -n $shown || -z $before || $before == undefined-key ]] || zle "$before" -- "$@"
}

_gptcli_forget() {
  _gptcli_texts=() _gptcli_for= _gptcli_mode= _gptcli_by_key=0
}

# Before the line is drawn: a ghost for another line goes; a line that has changed is asked about.
_gptcli_redraw() {
  emulate -L zsh
  local now="$CURSOR $BUFFER"
  if [[ -n $_gptcli_ghost ]]; then
    if [[ $_gptcli_for == "$now" && $POSTDISPLAY == "$_gptcli_ghost" && $KEYMAP != vicmd ]]; then
      _gptcli_paint # others may have painted over it
    else
      _gptcli_hide
    fi
  fi
  if [[ $_gptcli_seen != "$now" ]]; then
    _gptcli_seen=$now
    [[ -n $_gptcli_asked && $_gptcli_asked != "$now" ]] && _gptcli_hang_up
    [[ $_gptcli_for == "$now" ]] || _gptcli_forget
    if (( _gptcli_ghosts && ! PENDING && CURSOR && CURSOR == $#BUFFER )) && [[ $KEYMAP != vicmd && -z $_gptcli_for ]]; then
      _gptcli_ask $_gptcli_pause
    fi
  fi
  return 0
}

# The line begins, or ends: nothing of ours stays.
_gptcli_reset() {
  emulate -L zsh
  _gptcli_hide
  _gptcli_hang_up
  _gptcli_forget
  _gptcli_seen="$CURSOR $BUFFER" _gptcli_said=0
  return 0
}

_gptcli_bind() { # KEYMAP KEY WIDGET
  local place="$1 ${(g:ceo:)2}"
  _gptcli_before[$place]="${$(bindkey -M $1 -- "$2")##* }"
  _gptcli_bound+=("$1 $2")
  bindkey -M $1 -- "$2" $3-$1
}

gptcli-unload() {
  emulate -L zsh
  local place map key before
  _gptcli_hang_up
  add-zle-hook-widget -d line-pre-redraw _gptcli-redraw
  add-zle-hook-widget -d line-init _gptcli-reset
  add-zle-hook-widget -d line-finish _gptcli-reset
  for place in $_gptcli_bound; do
    map=${place%% *} key=${place#* }
    before="$map ${(g:ceo:)key}"
    before=$_gptcli_before[$before]
    [[ $(bindkey -M $map -- "$key") == *" _gptcli-"* ]] || continue # somebody else's by now
    if [[ $before == undefined-key ]]; then
      bindkey -M $map -r -- "$key"
    else
      bindkey -M $map -- "$key" $before
    fi
  done
  for place in ${(k)widgets[(I)_gptcli-*]}; do zle -D $place; done
  unset -m '_gptcli_*'
  unfunction -m '_gptcli_*' gptcli-unload
}

() {
  emulate -L zsh
  local map key
  zle -N _gptcli-answer _gptcli_answer
  zle -N _gptcli-redraw _gptcli_redraw
  zle -N _gptcli-reset _gptcli_reset
  for map in emacs viins; do
    zle -N _gptcli-press-$map _gptcli_press
    zle -N _gptcli-take-$map _gptcli_take
    zle -N _gptcli-word-$map _gptcli_word
    zle -N _gptcli-escape-$map _gptcli_escape
    _gptcli_bind $map "$_gptcli_key" _gptcli-press
    for key in '^[[C' '^[OC' '^[[F' '^[OF' '^[[4~' '^F' '^E'; do
      [[ $map == viins && $key == '^'[FE] ]] || _gptcli_bind $map $key _gptcli-take
    done
    _gptcli_bind $map '^[[1;5C' _gptcli-word
  done
  _gptcli_bind emacs '^[f' _gptcli-word
  _gptcli_bind emacs '^[' _gptcli-escape
  add-zle-hook-widget line-pre-redraw _gptcli-redraw
  add-zle-hook-widget line-init _gptcli-reset
  add-zle-hook-widget line-finish _gptcli-reset
}
