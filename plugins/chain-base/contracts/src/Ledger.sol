// SPDX-License-Identifier: MIT OR Apache-2.0
pragma solidity ^0.8.28;

import {Ownable, Ownable2Step} from "@openzeppelin/contracts/access/Ownable2Step.sol";
import {Pausable} from "@openzeppelin/contracts/utils/Pausable.sol";
import {ReentrancyGuardTransient} from "@openzeppelin/contracts/utils/ReentrancyGuardTransient.sol";
import {Address} from "@openzeppelin/contracts/utils/Address.sol";
import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {INodeRegistry} from "./interfaces/INodeRegistry.sol";

/// @title Money in, credits, money out
/// @notice The part that both lanes share. Coin enters with `postJob`, `openSession`, `topUp`, `challenge` and slashed bonds, and leaves
/// by `withdraw` alone, to whoever it was credited. The token `address(0)` is the native coin.
/// @dev The owner can stop new jobs and sessions. No function gives the owner, or anyone, another party's coin.
abstract contract Ledger is Ownable2Step, Pausable, ReentrancyGuardTransient {
    using SafeERC20 for IERC20;

    uint64 public constant MIN_DURATION_SECS = 10;
    uint64 public constant MAX_DURATION_SECS = 30 days;

    /// @notice The registry whose nodes may serve here.
    INodeRegistry public immutable nodes;

    /// @notice What `who` may withdraw, by token.
    mapping(address token => mapping(address who => uint256)) public credits;

    event Withdrawn(address indexed who, address indexed token, uint256 amount, address to);

    error ZeroAddress();
    error WrongValue(uint256 sent, uint256 expected);
    error ShortTransfer(address token, uint256 received, uint256 expected);
    error NothingToWithdraw(address token, address who);
    error DurationOutOfBounds(bytes32 field, uint256 secs, uint256 min, uint256 max);
    error OnlyRegistryPays(address caller);

    constructor(INodeRegistry nodes_, address owner_) Ownable(owner_) {
        if (address(nodes_) == address(0)) revert ZeroAddress();
        nodes = nodes_;
    }

    /// @notice Slashed bonds arrive here; any other plain transfer is refused, since nobody could withdraw it.
    receive() external payable {
        if (msg.sender != address(nodes)) revert OnlyRegistryPays(msg.sender);
    }

    /// @notice Stops `postJob` and `openSession`, and nothing else. Called by the owner.
    function pause() external onlyOwner {
        _pause();
    }

    /// @notice Lets jobs and sessions begin again. Called by the owner.
    function unpause() external onlyOwner {
        _unpause();
    }

    /// @notice Sends the caller's whole credit in `token` to `to`. Fails when there is none, or when `to` or the token refuses; the
    /// credit is then as before.
    function withdraw(address token, address to) external nonReentrant {
        if (to == address(0)) revert ZeroAddress();
        uint256 amount = credits[token][msg.sender];
        if (amount == 0) revert NothingToWithdraw(token, msg.sender);
        credits[token][msg.sender] = 0;
        emit Withdrawn(msg.sender, token, amount, to);
        if (token == address(0)) Address.sendValue(payable(to), amount);
        else IERC20(token).safeTransfer(to, amount);
    }

    /// @dev Takes the caller's own funds. A token that delivers less or more than asked, such as one with a transfer fee, is refused,
    /// because the promise to others would then exceed what is held.
    function _pull(address token, uint256 amount) internal {
        if (token == address(0)) {
            if (msg.value != amount) revert WrongValue(msg.value, amount);
            return;
        }
        if (msg.value != 0) revert WrongValue(msg.value, 0);
        uint256 before = IERC20(token).balanceOf(address(this));
        IERC20(token).safeTransferFrom(msg.sender, address(this), amount);
        uint256 balance = IERC20(token).balanceOf(address(this));
        uint256 received = balance < before ? 0 : balance - before;
        if (received != amount) revert ShortTransfer(token, received, amount);
    }

    function _credit(address token, address who, uint256 amount) internal {
        if (amount != 0) credits[token][who] += amount;
    }

    function _checkDuration(bytes32 field, uint256 secs) internal pure {
        if (secs < MIN_DURATION_SECS || secs > MAX_DURATION_SECS) {
            revert DurationOutOfBounds(field, secs, MIN_DURATION_SECS, MAX_DURATION_SECS);
        }
    }
}
